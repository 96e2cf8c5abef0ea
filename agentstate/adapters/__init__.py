"""Agent frameworks on AgentState: one module per framework, imported only if that framework is installed.

``openai_agents``
    the OpenAI Agents SDK's ``Session`` (``pip install 'agentstate[agents]'``)
``langgraph``
    LangGraph's checkpoint saver (``pip install 'agentstate[langgraph]'``); its tables are in ``tables``
``google_adk``
    Google ADK's session service (``pip install 'agentstate[adk]'``)
"""
